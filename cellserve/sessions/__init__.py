"""The command `cellserve sessions`: a look into a store, and sessions on their way from one store to another."""
