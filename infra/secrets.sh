#!/bin/sh
# secrets.sh DIR: every secret that compose.yaml and kubernetes/ read, as a file each. What is there already stays.
# The folder is its owner's alone. The files in it can be read by all, because the containers' users are not its owner.
set -eu
folder=${1:?folder that gets the secrets}
mkdir -p "$folder"
chmod 0700 "$folder"
cd "$folder"

random() { # 64 hexadecimal digits
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

keep() { # NAME TEXT
    if [ ! -e "$1" ]; then
        printf '%s' "$2" >"$1"
        chmod 0444 "$1"
    fi
}

for name in postgres foldin mlflow prefect; do
    keep "${name}_database_password" "$(random)"
done
keep webhook_secret "$(random)"
keep mlflow_webhook_key "$(head -c 32 /dev/urandom | base64 | tr '+/' '-_')"
keep prefect_auth "foldin:$(random)"
if [ ! -e store_credentials ]; then # the same key for those who ask the store, and for the store
    key=$(random)
    keep store_credentials "[default]
aws_access_key_id = foldin
aws_secret_access_key = $key
"
    rm -f store_identities.json
    keep store_identities.json '{"identities": [{"name": "foldin", "credentials": [{"accessKey": "foldin", "secretKey": "'"$key"'"}], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}'
fi
