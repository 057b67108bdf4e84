"""The verbs. One public function each, named like the file; ``pipeline`` alone knows their order."""
