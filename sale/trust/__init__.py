"""Proof and repair: witness, verification, recovery, audit."""
