"""Model card templates, filled from metrics.json and the provenance of a run."""
