#!/bin/sh
# The gateway with curl: sh examples/gateway/requests.sh
set -eu
url=${GATEWAY_URL:-http://127.0.0.1:9471}
key=${GATEWAY_KEY:-none}

ask() {
  printf '\n== %s\n' "$1"
  curl -sS -N "$url$1" -H "Authorization: Bearer $key" -H 'Content-Type: application/json' ${2:+-d "$2"}
  echo
}

hello='[{"role":"user","content":"Hello!"}]'
ask /health
ask /v1/models
ask /v1/chat/completions '{"messages":'"$hello"',"max_tokens":16}'
ask /v1/chat/completions '{"messages":'"$hello"',"max_tokens":4,"stream":true}'
ask /v1/completions '{"prompt":"Once upon a time","max_tokens":16}'
ask /v1/responses '{"input":"Hello!","max_output_tokens":16}'
ask /v1/messages '{"messages":'"$hello"',"max_tokens":16}'
ask /v1/messages/count_tokens '{"messages":'"$hello"'}'
ask /tokenize '{"content":"Hello!"}'
ask /detokenize '{"tokens":[1,2,3]}'
ask /apply-template '{"messages":'"$hello"'}'
# These need a model that can do it:
ask /v1/embeddings '{"input":["a fox","the sea"]}'
ask /v1/rerank '{"query":"fox","documents":["a fox","the sea"]}'
ask /infill '{"input_prefix":"def add(a, b):\n    return ","input_suffix":"\n","n_predict":8}'
