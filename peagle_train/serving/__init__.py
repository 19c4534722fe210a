"""Drafters' folders: reading anybody's, checking, exporting, starting from them."""
