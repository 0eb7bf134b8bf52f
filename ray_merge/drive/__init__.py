"""From a plan to published results: what is missing -> pool -> receipts -> manifest."""
