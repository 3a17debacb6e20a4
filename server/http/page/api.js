// Requests to the server: JSON, server-sent events, and errors in the server's own words.

import { apiKey, askForKey } from "./key.js";

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const LOST = "The connection to the server was lost.";

// Sends a GET, or a POST if there is a body. With `asks`, status 401 asks for a key and tries again.
export async function request(path, { body, signal, asks = false } = {}) {
  for (;;) {
    const response = await send(path, body, signal);
    if (response.ok) return response;
    const error = await readError(response);
    if (response.status !== 401 || !asks || !(await askForKey(error.message))) throw error;
  }
}

async function send(path, body, signal) {
  const headers = {};
  const key = apiKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
  if (body) options.body = JSON.stringify(body);
  return orLost(fetch(path, options), signal);
}

// Yields the JSON objects of a stream, until [DONE].
export async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await orLost(reader.read(), signal);
    if (done) throw new ServerError(LOST);
    const frames = (pending + value).split("\n\n");
    pending = frames.pop();
    for (const frame of frames) {
      if (!frame.startsWith("data: ")) continue;
      const data = frame.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message, event.error.code);
      yield event;
    }
  }
}

async function orLost(promise, signal) {
  try {
    return await promise;
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError(LOST);
  }
}

async function readError(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // a proxy's answer need not be JSON; the status says what is known
  }
  return new ServerError(message, response.status);
}
