{{- /* Ray's own pods talk to each other at ports that they choose. */ -}}
{{- define "serving.rayPeers" -}}
- podSelector:
    matchLabels:
      {{- include "slipway.selector" (dict "root" . "component" "ray-head") | nindent 6 }}
- podSelector:
    matchLabels:
      {{- include "slipway.selector" (dict "root" . "component" "ray-worker") | nindent 6 }}
{{- end -}}

{{- define "serving.scrapers" -}}
- from:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: {{ .Values.monitoring.namespace | quote }}
  ports:
    - port: metrics
{{- end -}}
