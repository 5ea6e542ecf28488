"""views: what people look at, drawn from the status segment. Nothing here asks a coordinator or changes anything."""
