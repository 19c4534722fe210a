"""The frozen target: features of three layers, long documents in chunks, features on disk."""
