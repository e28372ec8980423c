"""Disks and devices: metadata, reading, transforms, filling, writing."""
