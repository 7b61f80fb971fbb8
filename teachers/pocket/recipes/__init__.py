"""How the pocket teachers were trained, one module a teacher; `make pocket` runs them all."""
