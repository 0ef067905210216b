"""What the driver asks of a Kubernetes API server, through the official client's transport.

- `connect`: finds the cluster, by a kubeconfig or from within a pod.
- `client`: reads, lists, creates and deletes objects as plain mappings.
- `capabilities`: what Helm wants to know of the cluster.
- `apply`: server-side apply of rendered manifests, one or all, for real or as a dry run.
- `watch`: the state of objects and every change of it, over dropped connections and expired histories.
- `logs`: the lines of a pod, over dropped connections.
- `states` and the modules `*_states`: what the state of an object means for whoever waits for it.
- `revisions`, `inventory`, `rollout`, `readiness`: what `slipway deploy` keeps of a deployment, applies, prunes and waits for.

Every error is one of `infra.errors`: ConfigError where a person must change something, TransientError where waiting may do.
"""
