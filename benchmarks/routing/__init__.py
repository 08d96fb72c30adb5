"""Which policy serves a mesh best, in simulation."""
