"""Sessions in LMDB, an embedded store in a folder that all workers of one machine share."""
