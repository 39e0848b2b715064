#!/bin/sh
# Secrets are files. Where a program reads one from the environment only, NAME_FILE names the file that becomes NAME.
set -eu
for name in PGPASSWORD PREFECT_API_AUTH_STRING PREFECT_SERVER_API_AUTH_STRING MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY; do
    file=$(printenv "${name}_FILE" || true)
    if [ -n "$file" ]; then
        value=$(cat "$file")
        export "$name=$value"
    fi
done
exec "$@"
