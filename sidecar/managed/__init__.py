"""Servers that QMesh looks after itself: installed from a release or built from source."""
