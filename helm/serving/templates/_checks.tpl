{{- /* What a schema cannot see. Each line says what was found and what to do; all of them are shown at once. */ -}}
{{- define "serving.checks" -}}
{{- $problems := concat (include "serving.modelProblems" . | fromYamlArray) (include "serving.keyProblems" . | fromYamlArray) (include "serving.placeProblems" . | fromYamlArray) (include "serving.entryProblems" . | fromYamlArray) (include "serving.envProblems" . | fromYamlArray) -}}
{{- if $problems -}}
{{- fail (printf "%d problem(s)\n  - %s" (len $problems) (join "\n  - " $problems)) -}}
{{- end -}}
{{- end -}}

{{- define "serving.modelProblems" -}}
{{- $config := .Values.config -}}
{{- if eq (default "" $config.model.digest) (repeat 64 "0") }}
- "config.model.digest is all zeros: no model is named. Set config.model, for example --set config.model.digest=$(slipway status NAME --json | jq -r .versions[0].digest)."
{{- end }}
{{- if and (eq $config.model.type "store") (not .Values.store.url) }}
- "config.model.type is store, and store.url is empty. Give the store's URL."
{{- end }}
{{- if and (eq $config.model.type "registry") (not .Values.tracking.uri) }}
- "config.model.type is registry, and tracking.uri is empty. Give the address of the MLflow server."
{{- end }}
{{- if and (hasPrefix "file://" .Values.store.url) (not .Values.store.existingClaim) }}
- {{ printf "store.url %s is a path of each pod's own. Name a shared volume in store.existingClaim." .Values.store.url | quote }}
{{- end }}
{{- if has $config.serve.host (list "127.0.0.1" "localhost" "::1") }}
- {{ printf "config.serve.host is %s, at which only a gateway's own pod reaches it. Set it to 0.0.0.0 or '::'." $config.serve.host | quote }}
{{- end }}
{{- if $config.serve.adapters }}
- "config.serve.adapters names folders of one machine. Say them in config.adapters, by digest."
{{- end }}
{{- end -}}

{{- define "serving.keyProblems" -}}
{{- $serve := .Values.config.serve -}}
{{- $wantsKeys := default "" $serve.api_keys_file -}}
{{- if and .Values.apiKeys.existingSecret (ne $wantsKeys "/etc/slipway/api-keys/api_keys.json") }}
- {{ printf "apiKeys.existingSecret is %s, and config.serve.api_keys_file is not where it is mounted. Set that to /etc/slipway/api-keys/api_keys.json, or no request is asked for a key." .Values.apiKeys.existingSecret | quote }}
{{- end }}
{{- if and (hasPrefix "/etc/slipway/api-keys/" $wantsKeys) (not .Values.apiKeys.existingSecret) }}
- {{ printf "config.serve.api_keys_file is %s, and apiKeys.existingSecret is empty. Name the Secret that holds the file." $wantsKeys | quote }}
{{- end }}
{{- $trusts := default "" $serve.trusted_keys_file -}}
{{- if and (include "serving.hasTrusted" .) (ne $trusts "/etc/slipway/trusted/trusted.pem") }}
- "trustedKeys is given, and config.serve.trusted_keys_file is not where it is mounted. Set that to /etc/slipway/trusted/trusted.pem."
{{- end }}
{{- if and (hasPrefix "/etc/slipway/trusted/" $trusts) (not (include "serving.hasTrusted" .)) }}
- {{ printf "config.serve.trusted_keys_file is %s, and trustedKeys has neither pem nor existingConfigMap. Give one of them." $trusts | quote }}
{{- end }}
{{- if not $trusts }}
{{- range prepend (keys .Values.config.adapters | sortAlpha) .Values.config.model_name }}
{{- if not (has . $serve.allow_unsigned) }}
- {{ printf "no key is trusted, and %s is not in config.serve.allow_unsigned. Give trustedKeys and config.serve.trusted_keys_file, or allow it by name." . | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- if not (has "/health" $serve.open_paths) }}
- "config.serve.open_paths lacks /health, which the probes of Kubernetes ask without a key. Put it in."
{{- end }}
{{- if and .Values.monitoring.gateways.enabled (not (has "/metrics" $serve.open_paths)) }}
- "monitoring.gateways.enabled, and config.serve.open_paths lacks /metrics, which Prometheus asks without a key. Put it in."
{{- end }}
{{- end -}}

{{- /* Whether there can be room for all replicas: cores and GPUs of the groups at their largest. */ -}}
{{- define "serving.placeProblems" -}}
{{- $root := . -}}
{{- $serve := .Values.config.serve -}}
{{- $wanted := list -}}
{{- range $serve.pools -}}
{{- $wanted = append $wanted (dict "what" (printf "pool %s" .name) "accelerator" (default "cpu" .accelerator) "cpus" (default $serve.cpus_per_replica .cpus_per_replica) "replicas" (ternary (dig "max_replicas" 0 (default dict .autoscale)) (default 1 .num_replicas) (kindIs "map" .autoscale))) -}}
{{- else -}}
{{- $wanted = append $wanted (dict "what" "the model" "accelerator" (ternary "gpu" "cpu" (gt (int64 $serve.gpus_per_replica) 0)) "cpus" $serve.cpus_per_replica "replicas" (ternary (dig "max_replicas" 0 (default dict $serve.autoscale)) $serve.num_replicas (kindIs "map" $serve.autoscale))) -}}
{{- end -}}
{{- range $wanted }}
{{- $want := . }}
{{- $cpus := int64 (default 0 $want.cpus) }}
{{- if lt $cpus 1 }}
- {{ printf "config.serve.cpus_per_replica of %s is absent: on a cluster there is no machine whose cores could be shared out. Set it." $want.what | quote }}
{{- else }}
{{- $room := 0 }}
{{- range $name, $group := $root.Values.workerGroups }}
{{- if and $group.enabled (eq $group.accelerator $want.accelerator) }}
{{- $perPod := div (include "serving.cores" $group | int64) $cpus }}
{{- if eq $want.accelerator "gpu" }}{{ $perPod = min $perPod (include "serving.gpus" $group | int64) }}{{ end }}
{{- $room = add $room (mul $perPod (int64 $group.maxReplicas)) }}
{{- end }}
{{- end }}
{{- if lt $room (int64 $want.replicas) }}
- {{ printf "%s wants %d replicas of %d cores on %s nodes; the worker groups have room for %d. Raise maxReplicas or resources of a group with accelerator %s, or lower the replicas." $want.what (int64 $want.replicas) $cpus $want.accelerator $room $want.accelerator | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- range $name, $group := .Values.workerGroups }}
{{- if $group.enabled }}
{{- if gt (int64 $group.minReplicas) (int64 $group.maxReplicas) }}
- {{ printf "workerGroups.%s: minReplicas %d is above maxReplicas %d. Lower it." $name (int64 $group.minReplicas) (int64 $group.maxReplicas) | quote }}
{{- end }}
{{- if and (ne (int64 $group.minReplicas) (int64 $group.maxReplicas)) (not $root.Values.autoscaler.enabled) }}
- {{ printf "workerGroups.%s: minReplicas and maxReplicas differ, and autoscaler.enabled is false, so that nothing would start the pods between. Enable it, or make them equal." $name | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "serving.entryProblems" -}}
{{- with .Values.upgrade }}
{{- if eq .type "NewClusterWithIncrementalUpgrade" }}
{{- if not $.Values.autoscaler.enabled }}
- "upgrade.type is NewClusterWithIncrementalUpgrade, and autoscaler.enabled is false: KubeRay moves capacity by it. Enable it."
{{- end }}
{{- if not .gatewayClassName }}
- "upgrade.type is NewClusterWithIncrementalUpgrade, and upgrade.gatewayClassName is empty. Name a GatewayClass of the cluster."
{{- end }}
{{- if not ($.Capabilities.APIVersions.Has "gateway.networking.k8s.io/v1") }}
- "upgrade.type is NewClusterWithIncrementalUpgrade, and the cluster does not know gateway.networking.k8s.io/v1. Install the Gateway API, or take NewCluster."
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.ingress }}
{{- if and .enabled (not .host) }}
- "ingress.enabled, and ingress.host is empty. Give the name that clients use."
{{- end }}
{{- if and .enabled (not .tlsSecret) (not .allowPlainHttp) }}
- "ingress.enabled without ingress.tlsSecret: keys and prompts would pass in the clear. Name a Secret of type kubernetes.io/tls, or set ingress.allowPlainHttp."
{{- end }}
{{- end }}
{{- with .Values.route }}
{{- if .enabled }}
{{- if not .parentRefs }}
- "route.enabled, and route.parentRefs is empty. Name the Gateway that takes it."
{{- end }}
{{- if not ($.Capabilities.APIVersions.Has "gateway.networking.k8s.io/v1") }}
- "route.enabled, and the cluster does not know gateway.networking.k8s.io/v1. Install the Gateway API, or take ingress."
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.gateway.autoscaling }}
{{- if and .enabled (gt (int64 .minReplicas) (int64 .maxReplicas)) }}
- {{ printf "gateway.autoscaling: minReplicas %d is above maxReplicas %d. Lower it." (int64 .minReplicas) (int64 .maxReplicas) | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "serving.envProblems" -}}
{{- $taken := list "RAY_gcs_rpc_server_reconnect_timeout_s" -}}
{{- range include "serving.addresses" . | fromYamlArray -}}{{- $taken = append $taken .name -}}{{- end -}}
{{- range .Values.env }}
{{- if has .name $taken }}
- {{ printf "env names %s twice, or the chart sets it itself. Leave it out." .name | quote }}
{{- end }}
{{- $taken = append $taken .name -}}
{{- end }}
{{- end -}}
