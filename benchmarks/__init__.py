"""How fast and how exact: foldin against the published rule and other tools, on synthetic models; not imported."""
