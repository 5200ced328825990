"""Floor 3: the path of a query, from its text to its neuron. Nothing here needs a language model.

generators    from conditions to neurons
edits         what an edited model consists of
router        query -> condition -> gate -> fact -> neuron
saving        an edited model on the disk
"""
