"""The servers that Cellserve is measured beside, each written as a competent user would write it."""
