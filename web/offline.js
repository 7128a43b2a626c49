// index.html's service worker: keeps the files that its own address names, as they were when the
// network last gave them, and answers with them when it does not.
const files = new URL(location).searchParams.getAll("file");

addEventListener("install", (event) =>
  event.waitUntil(caches.open("tpsnet").then((cache) => cache.addAll(files))),
);
addEventListener("fetch", (event) =>
  event.respondWith(
    fetch(event.request).then(
      (response) => {
        if (response.ok) event.waitUntil(renew(event.request, response.clone()));
        return response;
      },
      async () => (await caches.match(event.request, { ignoreSearch: true })) ?? Response.error(),
    ),
  ),
);

async function renew(request, response) {
  const cache = await caches.open("tpsnet");
  const [kept] = await cache.keys(request, { ignoreSearch: true });
  if (kept) await cache.put(kept, response);
}
