"""Roles: named models, on the mesh or behind an address. Their verb is `complete`."""
