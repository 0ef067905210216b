"""`slipway deploy` and what goes with it: from a spec to the values of a chart, to manifests, to a cluster."""
