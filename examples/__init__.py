"""Examples of QMesh, to be read and run."""
