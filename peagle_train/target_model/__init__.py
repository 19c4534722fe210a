"""The frozen target: features of some of its layers, long documents in chunks, features on disk."""
