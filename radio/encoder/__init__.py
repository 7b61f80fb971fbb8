"""The product: one folder that transformers loads natively."""
