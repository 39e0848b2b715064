#!/bin/bash
# Run once by the image of PostgreSQL, on an empty volume: a user and a database each for foldin, MLflow and Prefect.
set -euo pipefail
psql=(psql --no-psqlrc --username "${POSTGRES_USER:-postgres}" --set ON_ERROR_STOP=1)
for name in foldin mlflow prefect; do
    export PASSWORD_FILE=${SECRETS:-/run/secrets}/${name}_database_password
    [ -s "$PASSWORD_FILE" ]
    "${psql[@]}" --dbname postgres --set "name=$name" <<'SQL'
\set password `cat "$PASSWORD_FILE"`
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
done
"${psql[@]}" --dbname prefect --command 'CREATE EXTENSION IF NOT EXISTS pg_trgm' # Prefect does not start without it
