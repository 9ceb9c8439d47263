// One answer, asked of the server by OpenAI's API and read as it streams.

export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// What the server answers to a request; Refusal where that is an error, in OpenAI's shape or in none.
export async function call(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (options.body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  const text = await response.text();
  let message = text.slice(0, 500);
  try { message = JSON.parse(text).error.message; } catch { /* a proxy's own page */ }
  const wait = response.headers.get("Retry-After");
  throw new Refusal(response.status, `${response.status}: ${message}${wait ? ` (again in ${wait} s)` : ""}`);
}

// The `data:` lines of a stream of server-sent events, each with the moment at which it arrived
// (https://html.spec.whatwg.org/multipage/server-sent-events.html).
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const at = performance.now();
    const lines = (rest + (value ?? "")).split(/\r?\n/);
    rest = done ? "" : lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield [line.slice(5).trim(), at];
    }
    if (done) return;
  }
}

// Ask for `body` and tell `heard` of each piece of text. Times are as seen here, in milliseconds from the request's
// start; tokens are the server's count. `perSecond` counts the tokens after the first; null where too few pieces came
// by themselves to tell, as where a busy server sends all of them at once.
export async function ask(path, key, body, signal, heard) {
  const began = performance.now();
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call(path, key, { method: "POST", body: JSON.stringify(asked), signal });
  const answer = { model: response.headers.get("x-loraloom-model"), first: null, last: null, tokens: 0, finish: null };
  let pieces = 0;
  const arrivals = new Set();
  for await (const [data, at] of events(response.body)) {
    if (data === "[DONE]") {
      answer.isWhole = true;
      break;
    }
    const event = JSON.parse(data);
    if (event.error) throw new Refusal(event.error.code, event.error.message);
    if (event.usage) answer.tokens = event.usage.completion_tokens;
    const choice = event.choices?.[0];
    if (!choice) continue;
    answer.finish = choice.finish_reason ?? answer.finish;
    const delta = choice.delta ?? {};
    const text = choice.text ?? [delta.reasoning, delta.reasoning_content, delta.content].filter(Boolean).join("");
    if (!text && delta.role) continue; // the opening of a chat; a token without text is half a character
    answer.last = at - began;
    arrivals.add(at);
    answer.first ??= answer.last;
    pieces += 1;
    if (text) heard(text);
  }
  if (!answer.isWhole) throw new Refusal(0, "the answer was cut off by the server");
  answer.tokens ||= pieces;
  const seconds = (answer.last - answer.first) / 1000;
  answer.perSecond = arrivals.size > 2 ? (answer.tokens - 1) / seconds : null;
  return answer;
}
