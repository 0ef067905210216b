{{- /* Name of the RayJob, which is also the instance of all its pods. */ -}}
{{- define "training.rayJobName" -}}
{{- default (include "slipway.fullname" .) .Values.rayJob.name -}}
{{- end -}}

{{- /* The command of the step's program. Schema and patterns leave nothing in it that a shell reads otherwise. */ -}}
{{- define "training.entrypoint" -}}
/opt/venv/bin/python -m infra.remote --store {{ .Values.store.url }} --job {{ .Values.rayJob.job }} --module {{ .Values.rayJob.module }}
{{- end -}}

{{- /* A pod of Ray: dict "root" $ "pod" .Values.workers "component" "ray-worker" "container" "ray-worker". */ -}}
{{- define "training.rayPod" -}}
metadata:
  labels:
    {{- include "slipway.labels" (dict "root" .root "component" .component "instance" (include "training.rayJobName" .root)) | nindent 4 }}
  {{- with .root.Values.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "slipway.pod" (dict "root" .root "pod" .pod) | nindent 2 }}
  serviceAccountName: {{ include "training.jobServiceAccountName" .root }}
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 60
  containers:
    - name: {{ .container }}
      image: {{ include "slipway.image" (dict "root" .root "image" .root.Values.image) }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      securityContext:
        {{- include "slipway.containerSecurity" .root | nindent 8 }}
      env:
        {{- include "slipway.addresses" .root | nindent 8 }}
        {{- with include "slipway.env" .root }}
        {{- . | nindent 8 }}
        {{- end }}
      {{- with include "slipway.addressSecrets" .root }}
      envFrom:
        {{- . | nindent 8 }}
      {{- end }}
      resources:
        {{- toYaml .pod.resources | nindent 8 }}
      {{- if eq .component "ray-head" }}
      ports:
        - name: gcs-server
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
        - name: client
          containerPort: 10001
        - name: metrics
          containerPort: 8080
      {{- else }}
      ports:
        - name: metrics
          containerPort: 8080
      {{- end }}
      volumeMounts:
        - name: home
          mountPath: /var/lib/slipway
        - name: tmp
          mountPath: /tmp
        - name: shared-memory
          mountPath: /dev/shm
        {{- include "slipway.storeMount" .root | nindent 8 }}
  volumes:
    - name: home
      emptyDir:
        sizeLimit: {{ .root.Values.scratch }}
    - name: tmp
      emptyDir: {}
    - name: shared-memory
      emptyDir:
        medium: Memory
        sizeLimit: {{ .pod.sharedMemory }}
    {{- include "slipway.storeVolume" .root | nindent 4 }}
{{- end -}}

{{- /* The account of Ray's pods: they call no API of Kubernetes. */ -}}
{{- define "training.jobServiceAccountName" -}}
{{- include "slipway.serviceAccountName" . -}}
{{- end -}}
