{{- /* Name of the RayJob, which is also the instance of all its pods. */ -}}
{{- define "training.rayJobName" -}}
{{- default (include "slipway.fullname" .) .Values.rayJob.name -}}
{{- end -}}

{{- /* Account of Ray's pods: they call no API of Kubernetes. */ -}}
{{- define "training.jobAccount" -}}
{{- default (ternary (printf "%s-jobs" (include "slipway.fullname" .)) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end -}}

{{- /* Account of the driver. */ -}}
{{- define "training.driverAccount" -}}
{{- with .Values.pipeline.serviceAccount -}}
{{- default (ternary (printf "%s-driver" (include "slipway.fullname" $)) "default" .create) .name -}}
{{- end -}}
{{- end -}}

{{- /* Whether a driver runs, now or by schedule: not empty. */ -}}
{{- define "training.hasDriver" -}}
{{- if or .Values.pipeline.enabled .Values.pipeline.schedule }}yes{{ end -}}
{{- end -}}

{{- /* The command of the step's program. The schema leaves nothing in it that a shell would read otherwise. */ -}}
{{- define "training.entrypoint" -}}
/opt/venv/bin/python -m infra.remote --store {{ .Values.store.url }} --job {{ .Values.rayJob.job }} --module {{ .Values.rayJob.module }}
{{- end -}}

{{- /* Whether Ray's autoscaler asks for pods: not empty. Kueue counts what a job asks for at its start, so there all are asked for then. */ -}}
{{- define "training.isElastic" -}}
{{- $workers := .Values.rayJob.numWorkers -}}
{{- if and (kindIs "slice" $workers) (not .Values.rayJob.queueName) }}{{ if lt (int64 (first $workers)) (int64 (last $workers)) }}yes{{ end }}{{ end -}}
{{- end -}}

{{- /* A pod of Ray: dict "root" $ "image" .Values.image "pod" .Values.workers "component" "ray-worker". KubeRay adds the command, RAY_ADDRESS, /dev/shm, and the
       wait for the head, with a copy of our security context, environment and mounts. */ -}}
{{- define "training.rayPod" -}}
metadata:
  labels:
    {{- include "slipway.labels" (dict "root" .root "ray" true "component" .component "instance" (include "training.rayJobName" .root)) | nindent 4 }}
  {{- with .root.Values.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "slipway.pod" (dict "root" .root "pod" .pod) | nindent 2 }}
  serviceAccountName: {{ include "training.jobAccount" .root | quote }}
  automountServiceAccountToken: false
  # For a program's last words to the store.
  terminationGracePeriodSeconds: 60
  containers:
    - name: {{ .component | quote }}
      image: {{ include "slipway.image" (dict "root" .root "image" .image) | quote }}
      imagePullPolicy: {{ .image.pullPolicy }}
      securityContext:
        {{- include "slipway.containerSecurity" .root | nindent 8 }}
      env:
        {{- include "slipway.addresses" .root | nindent 8 }}
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
        {{- if eq .component "ray-head" }}
        - name: gcs-server
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
        - name: client
          containerPort: 10001
        {{- end }}
        - name: dashboard-agent
          containerPort: 52365
        - name: metrics
          containerPort: 8080
      # Training takes all cores, so Ray may be slow to answer, and to start the pod again for that would cost the steps since a checkpoint.
      livenessProbe:
        httpGet:
          path: /api/local_raylet_healthz
          port: 52365
        initialDelaySeconds: 30
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: 30
      readinessProbe:
        httpGet:
          path: {{ ternary "/api/gcs_healthz" "/api/local_raylet_healthz" (eq .component "ray-head") }}
          port: {{ ternary 8265 52365 (eq .component "ray-head") }}
        initialDelaySeconds: 5
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 12
      volumeMounts:
        - name: home
          mountPath: /var/lib/slipway
        - name: tmp
          mountPath: /tmp
        {{- with include "slipway.mounts" .root }}{{ . | trim | nindent 8 }}{{- end }}
  volumes:
    - name: home
      emptyDir:
        sizeLimit: {{ include "slipway.quantity" .root.Values.scratch }}
    - name: tmp
      emptyDir: {}
    {{- with include "slipway.volumes" .root }}{{ . | trim | nindent 4 }}{{- end }}
    {{- if and (eq .component "ray-head") (include "training.isElastic" .root) }}
    {{- include "slipway.kubernetesToken" .root | nindent 4 }}
    {{- end }}
{{- end -}}

{{- /* The driver's pod, as a Job and a CronJob run it. */ -}}
{{- define "training.driverPod" -}}
{{- $pipeline := .Values.pipeline -}}
metadata:
  labels:
    {{- include "slipway.labels" (dict "root" $ "component" "driver") | nindent 4 }}
  annotations:
    slipway.dev/spec-sha256: {{ toYaml .Values.config | sha256sum }}
    {{- with .Values.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "slipway.pod" (dict "root" $ "pod" $pipeline) | nindent 2 }}
  serviceAccountName: {{ include "training.driverAccount" . | quote }}
  automountServiceAccountToken: true
  restartPolicy: Never
  terminationGracePeriodSeconds: 60
  containers:
    - name: driver
      image: {{ include "slipway.image" (dict "root" $ "image" .Values.pipelineImage) | quote }}
      imagePullPolicy: {{ .Values.pipelineImage.pullPolicy }}
      securityContext:
        {{- include "slipway.containerSecurity" . | nindent 8 }}
      args:
        - run
        - /etc/slipway/spec.yaml
        - --executor=kubernetes
        - --no-serve
        {{- range $pipeline.arguments }}
        - {{ . | quote }}
        {{- end }}
      env:
        {{- include "slipway.addresses" . | nindent 8 }}
        - name: SLIPWAY_KUBERNETES_VALUES
          value: /etc/slipway/kubernetes.yaml
        {{- if .Values.signing.existingSecret }}
        - name: SLIPWAY_SIGNING_KEY
          value: /etc/slipway-signing/signing.pem
        {{- end }}
        {{- with include "slipway.env" . }}{{ . | trim | nindent 8 }}{{- end }}
      {{- with include "slipway.addressSecrets" . }}
      envFrom:
        {{- . | trim | nindent 8 }}
      {{- end }}
      {{- with include "slipway.resources" $pipeline.resources }}
      resources:
        {{- . | trim | nindent 8 }}
      {{- end }}
      volumeMounts:
        - name: config
          mountPath: /etc/slipway
          readOnly: true
        {{- if .Values.signing.existingSecret }}
        - name: signing
          mountPath: /etc/slipway-signing
          readOnly: true
        {{- end }}
        - name: home
          mountPath: /var/lib/slipway
        - name: tmp
          mountPath: /tmp
        {{- with include "slipway.mounts" . }}{{ . | trim | nindent 8 }}{{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "slipway.fullname" . }}-pipeline
    {{- with .Values.signing.existingSecret }}
    - name: signing
      secret:
        secretName: {{ . | quote }}
        defaultMode: 0440
    {{- end }}
    - name: home
      {{- if .Values.home.enabled }}
      persistentVolumeClaim:
        claimName: {{ default (printf "%s-home" (include "slipway.fullname" .)) .Values.home.existingClaim | quote }}
      {{- else }}
      emptyDir: {}
      {{- end }}
    - name: tmp
      emptyDir: {}
    {{- with include "slipway.volumes" . }}{{ . | trim | nindent 4 }}{{- end }}
{{- end -}}

{{- /* What a Job and the CronJob's Jobs have in common. */ -}}
{{- define "training.jobSpec" -}}
{{- with .Values.pipeline -}}
backoffLimit: {{ int64 .backoffLimit }}
activeDeadlineSeconds: {{ int64 .activeDeadlineSeconds }}
ttlSecondsAfterFinished: {{ int64 .ttlSecondsAfterFinished }}
podFailurePolicy:
  rules:
    # A lost node or an eviction is not the run's fault: the next driver goes on with the same run.
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
    # Bad input (2) and a gate's refusal (3) stay what they are, however often one tries.
    - action: FailJob
      onExitCodes:
        containerName: driver
        operator: In
        values: [2, 3]
{{- end }}
{{- end -}}

{{- /* Values of this chart with which the executor renders one RayJob: it adds rayJob.enabled, name, module, job and numWorkers. What a
       release has once, such as its accounts, is not made again. */ -}}
{{- define "training.executorValues" -}}
{{- $kept := pick .Values "annotations" "engines" "env" "head" "image" "imagePullSecrets" "labels" "nameOverride" "rayJob" "rayToken" "scratch" "security" "solo" "store" "tracking" "volumes" "workers" -}}
{{- $own := dict
      "deployment" (include "slipway.deployment" .)
      "managedBy" "slipway"
      "monitor" (dict "enabled" false)
      "networkPolicy" (dict "enabled" false)
      "serviceAccount" (dict "create" false "name" (include "training.jobAccount" .)) -}}
{{- toYaml (merge $own $kept) -}}
{{- end -}}
