"""Learning phi: the outer loop in the driver, its anchors, its state in the store."""
