"""The model: embedding, blocks of attention and feed-forward, norm, head, and multi-token prediction."""
