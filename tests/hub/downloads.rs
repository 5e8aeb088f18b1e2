//! Downloads that break off, lie about themselves, or meet each other.

use super::*;

#[test]
fn a_download_that_breaks_off_goes_on_where_it_was() {
    let (server, place) = (HubServer::start(&[tiny()]), Place::new());
    server.fault("model.safetensors", Fault::Cut(100_000), 2);
    let folder = place.hub(&server.url).model(ID, "main").unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    let ranges: Vec<_> = server.take_seen().into_iter().filter(|s| s.store).map(|s| s.range).collect();
    assert_eq!(ranges, [None, Some("bytes=100000-".into()), Some("bytes=200000-".into())]);
    says(&place.said(), &["model.safetensors: broke off"]);
}

/// A connection that ends anywhere, and a run that is stopped anywhere: the file is the same in the end.
#[test]
fn a_drop_at_any_of_20_offsets_loses_nothing() {
    let length = weights().len();
    let spread = (1..12).map(|i| i * length / 12);
    let offsets: Vec<usize> =
        [0, 1, 2, 131_071, 131_072, 131_073, length - 2, length - 1, length].into_iter().chain(spread).collect();
    assert_eq!(offsets.len(), 20);
    std::thread::scope(|scope| {
        for offset in offsets {
            scope.spawn(move || {
                let (server, place) = (HubServer::start(&[tiny()]), Place::new());
                server.fault("model.safetensors", Fault::Cut(offset), 1);
                let folder = place.hub(&server.url).model(ID, "main").unwrap();
                assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights(), "dropped at {offset}");
                let asked: Vec<_> = server.take_seen().into_iter().filter(|s| s.store).map(|s| s.range).collect();
                let again = (offset > 0).then(|| format!("bytes={offset}-"));
                let expected = if offset == length { vec![None] } else { vec![None, again] };
                assert_eq!(asked, expected, "dropped at {offset}");

                // what a run leaves that was stopped there
                let (server, place) = (HubServer::start(&[tiny()]), Place::new());
                let blobs = place.repo().join("blobs");
                fs::create_dir_all(&blobs).unwrap();
                let part = blobs.join(format!("{}.incomplete", sha256(&weights())));
                fs::write(&part, &weights()[..offset]).unwrap();
                let folder = place.hub(&server.url).model(ID, "main").unwrap();
                assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights(), "stopped at {offset}");
                assert!(!part.exists());
            });
        }
    });
}

#[test]
fn a_server_that_treats_ranges_its_own_way_is_seen_through() {
    // the whole file where a part was asked for
    let (server, place) = (HubServer::start(&[tiny()]), Place::new());
    let part = |place: &Place, bytes: &[u8]| {
        fs::create_dir_all(place.repo().join("blobs")).unwrap();
        fs::write(place.repo().join("blobs").join(format!("{}.incomplete", sha256(&weights()))), bytes).unwrap();
    };
    part(&place, &weights()[..1000]);
    server.fault("model.safetensors", Fault::Whole, 1);
    let folder = place.hub(&server.url).model(ID, "main").unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());

    // a part that begins elsewhere; a part of another file; a part left over that is another file's
    for (fault, left) in [
        (Fault::Later, weights()[..1000].to_vec()),
        (Fault::Garble, weights()[..1000].to_vec()),
        (Fault::Cut(usize::MAX), vec![9; 1000]),
    ] {
        let (server, place) = (HubServer::start(&[tiny()]), Place::new());
        part(&place, &left);
        server.fault("model.safetensors", fault, 4);
        let error = input(place.hub(&server.url).model(ID, "main"));
        assert!(error.contains("SHA-256") || error.contains("no answer"), "{error}");
        assert!(!place.repo().join("blobs").join(sha256(&weights())).exists());
        server.fault("model.safetensors", Fault::Garble, 0);
        let folder = place.hub(&server.url).model(ID, "main").unwrap();
        assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    }
}

#[test]
fn content_that_is_swapped_between_two_connections_is_found() {
    let (server, place) = (HubServer::start(&[tiny()]), Place::new());
    server.fault("model.safetensors", Fault::Swap(100_000), 1);
    says(&input(place.hub(&server.url).model(ID, "main")), &["model.safetensors", "SHA-256", "thrown away"]);
    assert!(place.files("blobs").iter().all(|name| !name.contains("incomplete")));
    let folder = place.hub(&server.url).model(ID, "main").unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
}

#[test]
fn a_lie_about_the_length_is_found() {
    let length = weights().len();
    for (size, says_why) in [
        ((length + 1).to_string(), "ended after 300000 of 300001 bytes"),
        ((length - 1).to_string(), "more bytes came than the hub announced"),
        ("0".into(), "more bytes came than the hub announced"),
        ("18446744073709551615".into(), "ended after 300000 of"),
    ] {
        let (server, place) = (HubServer::start(&[Repo { size: Some(size.clone()), ..tiny() }]), Place::new());
        let error = input(place.hub(&server.url).model(ID, "main"));
        assert!(error.contains(says_why) || error.contains("no answer"), "{size}: {error}");
        assert!(!place.repo().join("blobs").join(sha256(&weights())).exists(), "{size}");
    }
    // no size at all: the hash decides
    for size in ["-1", "many", ""] {
        let (server, place) = (HubServer::start(&[Repo { size: Some(size.into()), ..tiny() }]), Place::new());
        let folder = place.hub(&server.url).model(ID, "main").unwrap();
        assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    }
    // a connection that says less than it brings is gone on with; one that says nothing ends where it ends
    for fault in [Fault::Short, Fault::NoLength] {
        let (server, place) = (HubServer::start(&[tiny()]), Place::new());
        server.fault("model.safetensors", fault, 1);
        let folder = place.hub(&server.url).model(ID, "main").unwrap();
        assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    }
}

#[test]
fn a_redirection_that_leads_nowhere_good_is_refused() {
    let away = HubServer::start(&[]);
    for (to, why) in [
        ("/model.safetensors?in=acme/tiny".to_string(), "redirects without end"),
        ("file:///etc/passwd".into(), "a redirection to nowhere"),
        ("ftp://localhost/x".into(), "a redirection to nowhere"),
        ("//".into(), "a redirection to nowhere"),
        ("model.safetensors".into(), "a redirection to nowhere"),
        (format!("{}/x", away.url), "404"),
        (format!("{}/x", nowhere()), "no answer"),
    ] {
        let gated = Repo { token: Some("hf_secret".into()), ..tiny() };
        let (server, place) = (HubServer::start(&[gated]), Place::new());
        server.fault("model.safetensors", Fault::Redirect(to.clone()), usize::MAX);
        let env = HubEnv { token: Some("hf_secret".into()), ..place.env(&server.url) };
        let error = input(place.hub_with(env).model(ID, "main"));
        assert!(error.contains(why) && !error.contains("hf_secret"), "{to}: {error}");
        assert!(place.files("blobs").iter().all(|name| *name != sha256(&weights())));
    }
    assert!(away.take_seen().iter().all(|seen| seen.authorization.is_none()), "the token stays at home");
}

#[test]
fn a_listing_that_is_none_is_refused() {
    let deep = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": {}", "[".repeat(100_000));
    let listing = |sha: &str, siblings: &str| format!("{{\"sha\": {sha}, \"siblings\": {siblings}}}");
    let commit = format!("\"{COMMIT}\"");
    for text in [
        String::new(),
        "<html>sign in</html>".into(),
        "[]".into(),
        "null".into(),
        "{}".into(),
        deep,
        listing("3", "[]"),
        listing("null", "[]"),
        listing("\"main\"", "[]"),
        listing("\"../../../../../../etc\"", "[]"),
        listing(&commit.to_uppercase(), "[]"),
        listing(&commit, "{}"),
        listing(&commit, "[3]"),
        listing(&commit, "[{}]"),
        listing(&commit, "[{\"rfilename\": 3}]"),
        listing(&commit, "[]"),
        listing(&commit, "[{\"rfilename\": \"../config.json\"}]"),
    ] {
        let (server, place) = (HubServer::start(&[Repo { listing: Some(text.clone()), ..tiny() }]), Place::new());
        let error = input(place.hub(&server.url).model(ID, "main"));
        let known = ["does not answer as a hub does", "the repository has no config.json"];
        assert!(known.iter().any(|why| error.contains(why)), "{text:.200}: {error}");
        assert!(!place.repo().exists());
    }
}

#[test]
fn a_later_run_goes_on_where_an_earlier_one_was_stopped() {
    let (server, place) = (HubServer::start(&[tiny()]), Place::new());
    // all but the weights, then what a stopped run leaves of them
    server.fault("model.safetensors", Fault::Status(404), 1);
    input(place.hub(&server.url).model(ID, "main"));
    let part = place.repo().join("blobs").join(format!("{}.incomplete", sha256(&weights())));
    assert!(!part.exists());
    fs::write(&part, &weights()[..123_456]).unwrap();
    server.take_seen();
    let folder = place.hub(&server.url).model(ID, "main").unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    let ranges: Vec<_> = server.take_seen().into_iter().filter(|s| s.store).map(|s| s.range).collect();
    assert_eq!(ranges, [Some("bytes=123456-".into())]);
    assert!(!part.exists());
}

#[test]
fn bytes_that_are_not_the_announced_ones_do_not_enter_the_cache() {
    let name = sha256(&weights());
    for (file, fault, why) in [
        ("model.safetensors", Fault::Garble, "SHA-256"),
        ("model.safetensors", Fault::TooMany, "more bytes"),
        ("tokenizer.json", Fault::TooMany, "more bytes"),
        ("tokenizer.json", Fault::Cut(3), "tokenizer.json"),
        ("tokenizer.json", Fault::Status(503), "503"),
    ] {
        let (server, place) = (HubServer::start(&[tiny()]), Place::new());
        server.fault(file, fault, usize::MAX);
        let error = input(place.hub(&server.url).model(ID, "main"));
        says(&error, &[ID, why]);
        let kept: Vec<_> = place.files("blobs").into_iter().filter(|f| f.contains("incomplete")).collect();
        assert!(kept.is_empty(), "{kept:?}");
        assert!(!place.repo().join("blobs").join(&name).exists());
        assert!(!place.repo().join("snapshots").join(COMMIT).join(file).exists());
        // and the next run is none the worse
        server.fault(file, Fault::Garble, 0);
        assert!(place.hub(&server.url).model(ID, "main").unwrap().join(file).exists());
    }
}

#[test]
fn a_server_that_is_no_hub_is_told_from_one() {
    let place = Place::new();
    for etag in ["../../../evil", "", "a/b"] {
        let server = HubServer::start(&[Repo { etag: Some(etag.into()), ..tiny() }]);
        says(&input(place.hub(&server.url).model(ID, "main")), &["ETag", "HF_ENDPOINT"]);
    }
    let server = HubServer::start(&[Repo { commit: "../../evil".into(), ..tiny() }]);
    says(&input(place.hub(&server.url).model(ID, "main")), &["commit", "HF_ENDPOINT"]);
    assert!(place.files("blobs").is_empty());
    // TLS that finds no TLS
    let https = HubServer::start(&[tiny()]).url.replace("http:", "https:");
    says(&input(place.hub(&https).model(ID, "main")), &[&https, "gives no answer"]);
}

#[test]
fn runs_that_start_together_download_once() {
    let (server, place) = (HubServer::start(&[tiny()]), Place::new());
    let folders = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(|| place.hub(&server.url).model(ID, "main").unwrap())).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect::<Vec<_>>()
    });
    for folder in folders {
        assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    }
    assert_eq!(server.take_seen().iter().filter(|s| s.store).count(), 1);
}
