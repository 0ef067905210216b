{{- /* Whether anything is kept on the volume: not empty. */ -}}
{{- define "tracking.hasVolume" -}}
{{- if not (and .Values.database.existingSecret .Values.artifacts.destination) }}yes{{ end -}}
{{- end -}}

{{- /* Names by which the server may be called: against pages that send a browser here under a name of theirs. Probes need none. */ -}}
{{- define "tracking.allowedHosts" -}}
{{- $name := include "slipway.fullname" . -}}
{{- $service := printf "%s.%s.svc" $name .Release.Namespace -}}
{{- $hosts := list "localhost" "127.0.0.1" $name (trimSuffix ".svc" $service) $service (printf "%s.cluster.local" $service) -}}
{{- if .Values.ingress.enabled }}{{ $hosts = append $hosts .Values.ingress.host }}{{ end -}}
{{- if .Values.route.enabled }}{{ $hosts = concat $hosts (.Values.route.hostnames | default list) }}{{ end -}}
{{- $hosts = concat $hosts (.Values.config.allowed_hosts | default list) | uniq -}}
{{- $named := list -}}
{{- range $hosts }}{{ $named = concat $named (list . (printf "%s:*" .)) }}{{ end -}}
{{- join "," $named -}}
{{- end -}}

{{- /* Address of the database, for the server and the migration. */ -}}
{{- define "tracking.databaseEnv" -}}
- name: MLFLOW_BACKEND_STORE_URI
  {{- with .Values.database }}
  {{- if .existingSecret }}
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret | quote }}
      key: {{ .key | quote }}
  {{- else }}
  value: sqlite:////var/lib/slipway/mlflow.db
  {{- end }}
  {{- end }}
{{- end -}}
