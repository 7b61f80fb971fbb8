"""The student: a ViT with NVIDIA's key names, one pair of heads per teacher, token merging."""
