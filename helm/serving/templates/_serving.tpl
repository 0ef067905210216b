{{- define "serving.modelName" -}}
{{- printf "%s-model" (include "slipway.fullname" .) -}}
{{- end -}}

{{- define "serving.gatewayName" -}}
{{- printf "%s-gateway" (include "slipway.fullname" .) -}}
{{- end -}}

{{- define "serving.headAccountName" -}}
{{- printf "%s-ray-head" (include "slipway.fullname" .) -}}
{{- end -}}

{{- define "serving.trustedName" -}}
{{- default (printf "%s-trusted" (include "slipway.fullname" .)) .Values.trustedKeys.existingConfigMap -}}
{{- end -}}

{{- define "serving.hasTrusted" -}}
{{- if or .Values.trustedKeys.pem .Values.trustedKeys.existingConfigMap }}true{{ end -}}
{{- end -}}

{{- /* Whole cores of a pod, as Ray counts them: its limit, or else its request. */ -}}
{{- define "serving.cores" -}}
{{- $resources := .resources | default dict -}}
{{- $cpu := toString (default (dig "requests" "cpu" 0 $resources) (dig "limits" "cpu" 0 $resources)) -}}
{{- if hasSuffix "m" $cpu -}}
{{- div (trimSuffix "m" $cpu | int64) 1000 -}}
{{- else -}}
{{- floor (float64 $cpu) | int64 -}}
{{- end -}}
{{- end -}}

{{- /* GPUs of a pod: the first resource whose name ends in gpu, or a part of one (MIG). */ -}}
{{- define "serving.gpus" -}}
{{- $gpus := 0 -}}
{{- range $name, $count := dig "limits" dict (.resources | default dict) -}}
{{- if or (hasSuffix "gpu" $name) (contains "/mig-" $name) -}}{{- $gpus = int64 $count -}}{{- end -}}
{{- end -}}
{{- $gpus -}}
{{- end -}}

{{- /* Whether replicas may go altogether while nobody asks. */ -}}
{{- define "serving.maySleep" -}}
{{- $serve := .Values.config.serve -}}
{{- $all := list $serve.autoscale -}}
{{- if $serve.pools -}}
{{- $all = list -}}
{{- range $serve.pools -}}{{- $all = append $all .autoscale -}}{{- end -}}
{{- end -}}
{{- $sleeps := "" -}}
{{- range $all -}}
{{- if kindIs "map" . -}}{{- if and (hasKey . "min_replicas") (eq 0 (int64 .min_replicas)) -}}{{- $sleeps = "true" -}}{{- end -}}{{- end -}}
{{- end -}}
{{- $sleeps -}}
{{- end -}}

{{- /* What gateways and replicas must know of each other. */ -}}
{{- define "serving.addresses" -}}
{{- include "slipway.addresses" . }}
- name: SLIPWAY_GATEWAYS
  value: {{ printf "%s-gateways:%d" (include "slipway.fullname" .) (int64 .Values.config.announce_port) | quote }}
- name: SLIPWAY_FRONT_TOKEN_FILE
  value: /etc/slipway/front/token
{{- if include "serving.maySleep" . }}
- name: SLIPWAY_WAKE_URL
  value: {{ printf "http://%s-head-svc:8000" (include "serving.modelName" .) | quote }}
{{- end }}
- name: DO_NOT_TRACK
  value: "1"
- name: HF_HUB_OFFLINE
  value: "1"
- name: MLFLOW_DISABLE_TELEMETRY
  value: "true"
- name: PYTHONUNBUFFERED
  value: "1"
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: TOKENIZERS_PARALLELISM
  value: "false"
{{- end -}}

{{- define "serving.tokenVolume" -}}
- name: front-token
  secret:
    secretName: {{ .Values.gateway.tokenSecret.name | quote }}
    defaultMode: 0440
    items:
      - key: {{ .Values.gateway.tokenSecret.key | quote }}
        path: token
{{- end -}}

{{- define "serving.apiKeysMount" -}}
{{- if .Values.apiKeys.existingSecret }}
- name: api-keys
  mountPath: /etc/slipway/api-keys
  readOnly: true
{{- end }}
{{- end -}}

{{- define "serving.apiKeysVolume" -}}
{{- if .Values.apiKeys.existingSecret }}
- name: api-keys
  secret:
    secretName: {{ .Values.apiKeys.existingSecret | quote }}
    defaultMode: 0440
    items:
      - key: {{ .Values.apiKeys.key | quote }}
        path: api_keys.json
{{- end }}
{{- end -}}

{{- /* Ray Serve's applications: one, or one a pool. */ -}}
{{- define "serving.serveConfig" -}}
proxy_location: HeadOnly
http_options:
  host: 0.0.0.0
  port: 8000
applications:
  {{- $config := .Values.config }}
  {{- range default (list dict) $config.serve.pools }}
  {{- $name := default "" .name }}
  {{- $autoscale := default dict (ternary .autoscale $config.serve.autoscale (not (not $name))) }}
  {{- $sleeps := and (hasKey $autoscale "min_replicas") (eq 0 (int64 $autoscale.min_replicas)) }}
  - name: {{ compact (list "slipway" $name) | join "-" }}
    import_path: serving.cluster_app:build
    route_prefix: {{ ternary (compact (list "/wake" $name) | join "/") "null" $sleeps }}
    args:
      pool: {{ $name | quote }}
      config:
        {{- toYaml $config | nindent 8 }}
  {{- end }}
{{- end -}}
