{{- /* A pod of Ray: dict "root" $ "pod" .Values.head "component" "ray-head" "image" .Values.cpuImage. */ -}}
{{- define "serving.rayPod" -}}
{{- $config := .root.Values.config -}}
{{- $drain := ceil $config.serve.drain_timeout_s | int64 -}}
{{- $isHead := eq .component "ray-head" -}}
metadata:
  labels:
    {{- include "slipway.labels" (dict "root" .root "ray" true "component" .component) | nindent 4 }}
  {{- with .root.Values.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "slipway.pod" (dict "root" .root "pod" .pod) | nindent 2 }}
  {{- if and $isHead .root.Values.autoscaler.enabled }}
  serviceAccountName: {{ include "serving.headAccountName" .root | quote }}
  {{- else }}
  serviceAccountName: {{ include "slipway.serviceAccountName" .root | quote }}
  {{- end }}
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ ternary 30 (add $drain 30) $isHead }}
  containers:
    - name: {{ .component | quote }}
      image: {{ include "slipway.image" (dict "root" .root "image" .image) | quote }}
      imagePullPolicy: {{ .image.pullPolicy }}
      securityContext:
        {{- include "slipway.containerSecurity" .root | nindent 8 }}
      env:
        {{- include "serving.addresses" .root | nindent 8 }}
        # Replicas outlive a head that is gone for as long as their answers may take.
        - name: RAY_gcs_rpc_server_reconnect_timeout_s
          value: {{ add $drain 60 | quote }}
        {{- with include "slipway.env" .root }}{{ . | trim | nindent 8 }}{{- end }}
      {{- with include "slipway.addressSecrets" .root }}
      envFrom:
        {{- . | trim | nindent 8 }}
      {{- end }}
      {{- with include "slipway.resources" .pod.resources }}
      resources:
        {{- . | trim | nindent 8 }}
      {{- end }}
      ports:
        {{- if $isHead }}
        - name: gcs-server
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
        - name: serve
          containerPort: 8000
        {{- else }}
        - name: replica
          containerPort: {{ int64 $config.first_replica_port }}
        {{- end }}
        - name: metrics
          containerPort: 8080
        - name: dashboard-agent
          containerPort: 52365
      livenessProbe:
        httpGet:
          path: /api/local_raylet_healthz
          port: dashboard-agent
        initialDelaySeconds: 30
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 12
      readinessProbe:
        httpGet:
          path: {{ ternary "/api/gcs_healthz" "/api/local_raylet_healthz" $isHead }}
          port: {{ ternary "dashboard" "dashboard-agent" $isHead }}
        initialDelaySeconds: 5
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 3
      {{- if not $isHead }}
      lifecycle:
        preStop:
          exec:
            command: [/opt/venv/bin/python, -m, serving.node, --timeout-s, {{ $drain | quote }}]
      {{- end }}
      volumeMounts:
        - name: home
          mountPath: /var/lib/slipway
        - name: tmp
          mountPath: /tmp
        - name: front-token
          mountPath: /etc/slipway/front
          readOnly: true
        {{- if not $isHead }}
        {{- with include "serving.apiKeysMount" .root }}{{ . | trim | nindent 8 }}{{- end }}
        {{- if include "serving.hasTrusted" .root }}
        - name: trusted
          mountPath: /etc/slipway/trusted
          readOnly: true
        {{- end }}
        {{- with include "slipway.mounts" .root }}{{ . | trim | nindent 8 }}{{- end }}
        {{- end }}
  volumes:
    - name: home
      emptyDir:
        sizeLimit: {{ ternary "1Gi" (toYaml .pod.home) $isHead }}
    - name: tmp
      emptyDir: {}
    {{- include "serving.tokenVolume" .root | nindent 4 }}
    {{- if not $isHead }}
    {{- with include "serving.apiKeysVolume" .root }}{{ . | trim | nindent 4 }}{{- end }}
    {{- if include "serving.hasTrusted" .root }}
    - name: trusted
      configMap:
        name: {{ include "serving.trustedName" .root | quote }}
    {{- end }}
    {{- with include "slipway.volumes" .root }}{{ . | trim | nindent 4 }}{{- end }}
    {{- else if .root.Values.autoscaler.enabled }}
    # For the autoscaler's container only: what runs under Ray gets no word to Kubernetes.
    {{- include "slipway.kubernetesToken" .root | nindent 4 }}
    {{- end }}
{{- end -}}
