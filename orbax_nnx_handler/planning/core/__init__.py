"""Words that every stage uses: paths, leaves, dtypes, recipes, regions, errors."""
