"""Why a checkpoint does not become a target, and the way out."""
