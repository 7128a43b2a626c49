// index.html's service worker: keeps the files that its own address names, and answers with them
// when the network does not. The page itself renews those that may change.
const files = new URL(location).searchParams.getAll("file");

addEventListener("install", (event) =>
  event.waitUntil(caches.open("tpsnet").then((cache) => cache.addAll(files))),
);
addEventListener("fetch", (event) =>
  event.respondWith(
    fetch(event.request).catch(
      async () =>
        (await caches.match(event.request, { ignoreSearch: true, ignoreVary: true })) ??
        Response.error(),
    ),
  ),
);
