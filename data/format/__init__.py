"""What lies on disk: manifest, shards, packed rows. Opens no file of the network.

May import: errors.
"""
