"""Small teachers that were really trained, and what they were trained by."""
