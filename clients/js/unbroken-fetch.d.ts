export interface ResumingFetchOptions {
  /** Attempts in a row that bring no event and no stream that stands for a second, before the first error is thrown. Default 8. */
  maxRetries?: number;
  /** Milliseconds before the second attempt; doubles with each, less up to half by chance. Default 250. */
  backoffMs?: number;
  /** What it doubles to, milliseconds; a `Retry-After` (up to 120 s) may exceed it. Default 8000. */
  maxBackoffMs?: number;
  /** Origins (`https://other:3000`) of more gateways on the same Redis, tried in turn. They get the API key too. */
  fallbacks?: string[];
}

/** Return a `fetch` that goes on with a stream of `POST …/chat/completions` where it broke. */
export function resumingFetch(
  fetch?: typeof globalThis.fetch,
  options?: ResumingFetchOptions,
): typeof globalThis.fetch;
