"""One loss, one file: `nn.Module`s from Rows to Terms (sum and count, never a mean).

Attributes the engine reads: `symmetric` (with `queries: anchors`, also with the roles exchanged), `explicit_for_anchors`
(explicit negatives are candidates of view 0 only) and `temporaries` (how many [q, G] arrays live at once).
"""
