"""What is in LMDB: the environment, its typed tables, and the transactions over them."""
