"""Recommendation (SAIL-Embedding, section 3.3.5): behaviour data, interests of users, teachers, ID embeddings."""
