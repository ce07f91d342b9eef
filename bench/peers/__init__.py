"""The servers that Cellserve is compared with, each written as a competent user would write it."""
