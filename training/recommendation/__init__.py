"""Recommendation (SAIL-Embedding, section 3.3.5): behaviour data, and the interests of users that are trained on."""
