"""Generate samples, measure them and record what was measured."""
