"""Model definitions: a thin Linen layer; parameters are plain pytrees everywhere else."""
