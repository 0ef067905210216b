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
          kubernetes.io/metadata.name: {{ .Values.monitoring.namespace }}
  ports:
    - port: metrics
{{- end -}}

{{- define "serving.egress" -}}
{{- with .Values.networkPolicy.egress }}
egress:
  - ports:
      - port: 53
        protocol: UDP
      - port: 53
        protocol: TCP
  - to:
      {{- range list "gateway" "ray-head" "ray-worker" }}
      - podSelector:
          matchLabels:
            {{- include "slipway.selector" (dict "root" $ "component" .) | nindent 12 }}
      {{- end }}
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
