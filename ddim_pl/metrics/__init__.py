"""Feature extractors and what torchmetrics lacks."""
