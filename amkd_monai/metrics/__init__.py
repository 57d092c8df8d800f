"""Metrics per case, their aggregation with confidence intervals, and paired comparisons."""
